"""One rank's share of the arithmetic. Nothing in here communicates.

Legend of shapes: B batch, L length, T = B L tokens, D hidden size, H query heads, G key-value
heads, E experts, K experts a token, F intermediate size; _local is this rank's part.
"""
