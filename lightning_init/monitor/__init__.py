"""From a layer's output to the statistics of a logged step: collect, add up over ranks, finish."""
