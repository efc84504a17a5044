"""How things are shown: `outline` folds names into a tree, `text` and `html` write it out, `plots` draws figures.

Everything here takes finished values and returns strings or figures. Nothing reads a file or computes a result. matplotlib is
imported inside the functions of `plots`; the rest needs only the standard library, so a report prints in milliseconds.
"""
