"""Tests, collectives, prefill, decode and a rank's death on 2, 4 or 8 GPUs of one host, step by
step, and what they say of the predictions: `python -m stepmoe multi-gpu`.
"""
