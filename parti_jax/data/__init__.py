"""Sources of captions and pictures: builders, readers, seqio tasks, vocabularies."""
