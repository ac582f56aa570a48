"""How the shipped stand-ins are made: text, vocabularies, training, evaluation. No notebook imports this."""
