"""Ids with a meaning of their own in this package's vocabularies and in T5's."""

PAD_ID = 0
EOS_ID = 1
