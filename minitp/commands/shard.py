"""`minitp shard`."""


def shard(args, tp):
    """Print the plan; write the ranks' files."""
    raise NotImplementedError
