"""What the search direction noise is made of: any nn.Module, any batches; knows nothing of runs, files or flags."""
