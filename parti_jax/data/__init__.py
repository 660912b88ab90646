"""Where captions and pictures come from: builders, sources, seqio tasks, vocabularies."""
