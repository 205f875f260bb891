"""odqa-mini: small general language models of our own, so that everything frozen can be tried offline.

`mini` is the encoder-decoder, `tasks` is what both models were pre-trained on, `pretrain` trains them. To the rest of
odqa they are models like any other: they load through `transformers`' Auto classes, which `auto` tells of them.
"""
