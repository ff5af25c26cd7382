"""Messages to commands: every rule of the contract, and every violation of one at once.

One file per kind of message. A function here takes a request and returns what core takes, or raises InvalidArgument
with all that is wrong. Nothing here looks at the state of the world: whether a card is free is core's to say.
"""
