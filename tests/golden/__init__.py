"""Inputs and results of `tf_keras.backend.rnn`, and what it takes to make the same calls again."""
