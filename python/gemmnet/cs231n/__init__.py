"""The fast layers of CS231n's notebooks, by the names, arguments and results that they have there."""
