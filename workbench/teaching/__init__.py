"""Teaching: what the notebooks need so that their cells stay thin.

    data = samples.digits()                                # 1,797 real handwritten digits, split into train and test
    samples.train_epoch(model, data, optimizer, seed=1)    # one pass over the training half; returns the mean loss
    samples.accuracy(model, data)                          # on the test half, which no training saw

`samples` holds a small model and real data. Exercises and their checks are the next to come here.
"""
