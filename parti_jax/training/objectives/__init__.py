"""The training objective of each network: batches in, losses out."""
