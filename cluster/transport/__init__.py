"""gRPC between the processes of a cluster: the data plane's streams and the control plane's channels.

It moves bytes and reports loss. It refuses to know what a frame holds or what a plan is.
"""
