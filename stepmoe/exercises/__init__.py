"""What the notebooks ask the reader to write, and the judges: one module a notebook."""

from stepmoe.exercises.exercise import Exercise, ExerciseError, Score, Traffic, exercise

__all__ = ["Exercise", "ExerciseError", "Score", "Traffic", "exercise"]
