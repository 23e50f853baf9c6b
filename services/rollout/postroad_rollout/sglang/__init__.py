"""SGLang, unpatched, as an engine of the mesh: launched, supervised, and given each new version of the weights.

server    the process: command line, readiness, death of the whole tree
launcher  what runs in that process: SGLang's own main, with the secret taken from the environment
weights   a version staged on the GPU and handed over by CUDA IPC
engine    SGLang's control endpoints as the verbs that the weight puller uses
"""
