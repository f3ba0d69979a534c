"""Networks trained to few bytes by other methods than seeds, in the harness of `rbe train`."""
