"""Federated averaging: the plan, the training of one client, the rounds of the server, and Flower's messages."""
