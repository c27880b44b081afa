"""One optimiser step of members side by side: the contract, the reference, and the fast ways."""
