"""The programs that a guest runs; each keeps all its state in guest RAM and checks what it finds there."""
