"""Analyses: one checkpoint -> a report of numbers.

wb.scan("model.pt")                  # what loading it would import and call, and whether that is safe
wb.checkup("model.pt")               # what is wrong or could be better, each with its line of cure
wb.describe(ckpt)                    # which network it holds, with the evidence, against its config.json
wb.archive("model.pt")               # the container's own pieces
wb.stats(ckpt, names="*.weight")     # min, max, mean, std, zeros, NaN, Inf, histogram per tensor
wb.ledger(ckpt)                      # what every byte of the file is for
wb.sparsity(ckpt)                    # zeros, 2:4, and which way of storing them is smallest
"""
