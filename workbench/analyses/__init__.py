"""Analyses: one checkpoint -> a report of numbers.

wb.stats(ckpt, names="*.weight")     # min, max, mean, std, zeros, NaN, Inf, histogram per tensor
wb.ledger(ckpt)                      # what every byte of the file is for
"""
