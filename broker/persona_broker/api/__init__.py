"""The HTTP interface, one blueprint a resource."""
