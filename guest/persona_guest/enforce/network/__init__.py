"""Network access: one nftables table, and routes."""
