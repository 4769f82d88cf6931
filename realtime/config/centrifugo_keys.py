"""The keys of a Centrifugo v6 file that realtime does not support, or does not support yet.

An operator who reuses a Centrifugo file gets a message about each such key by name, instead of "unknown key". Only the
topmost unsupported key is listed: nothing below `admin` is.
"""

from __future__ import annotations

# The tables with channel options: `channel.without_namespace` and each namespace.
_CHANNEL_TABLES = ("channel.without_namespace", "channel.namespaces[]")

_PLANNED = {
    "": ("admin broker debug health map_broker pid_file presence_manager prometheus shared_poll swagger"),
    "http_server": "h2c_external http3 internal_tls tls tls_autocert tls_external",
    "log": "file",
    "node": "info_metrics_aggregate_interval",
    "engine.redis": ("force_resp2 history_use_lists presence_hash_field_ttl presence_user_mapping replica_client"),
    "engine.redis.tls": "insecure_skip_verify",
    "engine.redis.sentinel_tls": "insecure_skip_verify",
    "client": (
        "channel_position_max_time_lag connect_code_to_unidirectional_disconnect insecure_skip_token_signature_verify"
        " presence_update_interval"
    ),
    "client.token": "insecure_skip_jwks_endpoint_safety_check",
    "client.subscription_token": "insecure_skip_jwks_endpoint_safety_check",
    "http_api": "external",
    "rpc": "namespace_boundary namespaces without_namespace",
    "websocket": "read_buffer_size use_write_buffer_pool write_buffer_size",
    "uni_websocket": (
        "disable_closing_handshake disable_disconnect_push join_push_messages read_buffer_size use_write_buffer_pool"
        " write_buffer_size"
    ),
    "uni_sse": "connect_code_to_http_response",
    "uni_http_stream": "connect_code_to_http_response",
} | dict.fromkeys(
    _CHANNEL_TABLES,
    "map map_clients_presence_channel_prefix map_users_presence_channel_prefix shared_poll subscription_type",
)

_UNSUPPORTED = {
    "": (
        "brokers clickhouse_analytics consumers controller database enable_unreleased_features graphite grpc_api"
        " license map_brokers opentelemetry presence_managers proxies push_notifications schemas shared_poll_relay"
        " singleflight token_revoke uni_grpc usage_stats user_block user_status user_tokens_invalidate"
        " webtransport"
    ),
    "client": (
        "batch_periodic_events max_messages_in_frame proxy queue_shrink_delay rate_limit reply_without_queue"
        " write_delay write_with_timer"
    ),
    "channel": "patterns proxy",
    "engine.redis": "sharded_pub_sub_partitions",
    "engine.redis.tls": "client_ca_pem",  # of servers
    "engine.redis.sentinel_tls": "client_ca_pem",
    "http_api": "jwks",
    "websocket": "compression_prepared_message_cache_size",
} | dict.fromkeys(
    _CHANNEL_TABLES,
    "allow_channel_compaction batch_max_delay batch_max_size broker_name client_publication"
    " client_publish_debounce_interval keep_latest_publication presence_manager_name publish_cel"
    " publish_proxy_enabled publish_proxy_name shared_position_sync sub_refresh_proxy_enabled sub_refresh_proxy_name"
    " subscribe_cel subscribe_proxy_enabled subscribe_proxy_name subscribe_stream_proxy_bidirectional"
    " subscribe_stream_proxy_enabled subscribe_stream_proxy_name",
)


def _dotted_keys(names_by_table: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{table}.{name}".lstrip(".") for table, names in names_by_table.items() for name in names.split())


PLANNED = _dotted_keys(_PLANNED)
UNSUPPORTED = _dotted_keys(_UNSUPPORTED)


def explain_key(key: str) -> str | None:
    """Return the message for a key of Centrifugo's, None for any other key. key: dotted, "[]" for any list index."""
    if key in UNSUPPORTED:
        return "a Centrifugo key that realtime does not support; remove it"
    if key in PLANNED:
        return "a Centrifugo key that realtime does not support yet; remove it"
    return None
