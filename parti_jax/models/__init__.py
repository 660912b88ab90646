"""The networks of the papers, as linen modules; they know no trainer and no data."""
