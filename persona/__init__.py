"""The words that broker and guest share: documents, patterns, decisions, wire codec, problem codes.

Values and pure functions only, standard library only.  Nothing here opens a file, a socket or a
process, reads the clock or the environment, or imports the broker or the guest.
"""
