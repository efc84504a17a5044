"""Key maps: which tensor of a checkpoint belongs to which tensor of a model, why, and the load that proves it.

keymap = wb.match(ckpt, model)                    # rules with reasons; what is ambiguous is said, never guessed
fixed = wb.ops.rename(ckpt, keymap.mapping)       # the training checkpoint with its keys repaired
wb.load_into(model, ckpt).check()                 # a certificate: every value compared with the file
"""
