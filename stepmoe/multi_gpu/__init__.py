"""The whole comparison on 2, 4 or 8 GPUs of one host, step by step, and what it says of the
predictions: `python -m stepmoe multi-gpu`.
"""
