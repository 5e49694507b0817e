"""Sharded checkpoints of training (torch.distributed.checkpoint and state dicts) as plain folders."""
