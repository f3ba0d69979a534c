"""rbe: neural-network weights stored as seeds and generated inside the matrix product."""
