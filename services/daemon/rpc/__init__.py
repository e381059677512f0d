"""The services of ``theseus.engine.v1``: unwrap the request, call the domain, wrap the answer."""
