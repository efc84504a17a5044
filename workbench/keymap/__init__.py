"""Key maps: how each tensor of a model is made from those of a checkpoint, why, and the load that proves it.

keymap = wb.match(ckpt, model)                    # rules with reasons; what is ambiguous is said, never guessed
fixed = keymap.apply(ckpt)                        # the model's own names, fused, split and transposed as the map says; unread
wb.load_into(model, ckpt, keymap).check()         # a certificate: every value compared with the file
"""
