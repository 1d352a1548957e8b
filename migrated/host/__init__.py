"""One host: its guests, its outgoing and incoming attempts, and what a restarted daemon finds of them."""
