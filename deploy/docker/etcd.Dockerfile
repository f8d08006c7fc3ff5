# etcd for one machine, as Debian has it. etcd-client is there for the health check.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends etcd-client etcd-server \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /var/lib/etcd \
    && chown 10001:10001 /var/lib/etcd
ENV ETCDCTL_API=3 \
    ETCD_DATA_DIR=/var/lib/etcd \
    ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379 \
    ETCD_ADVERTISE_CLIENT_URLS=http://etcd:2379 \
    ETCD_AUTO_COMPACTION_RETENTION=1h \
    ETCD_LOGGER=zap \
    ETCD_LOG_LEVEL=warn
USER 10001:10001
VOLUME /var/lib/etcd
EXPOSE 2379
CMD ["etcd"]
