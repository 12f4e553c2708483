"""What a run is made of: data, the loop, measuring, the record, wandb."""
