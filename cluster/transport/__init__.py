"""gRPC between the processes of a cluster: the data plane's streams and the control plane's channels.

It moves bytes and reports lost connections. It refuses to know what a frame contains or what a plan is.
"""
