"""A GraphQL server on Debian's graphql-core, and a client of it; which operation runs is for graphql-core to say.

usage: graphql_peer.py serve NAME [ADDRESS]   prints its port
       graphql_peer.py call ADDRESS           exits with 0 when GetCart, and nothing else, was executed by `local`
"""
import http.client
import http.server
import json
import sys
import urllib.parse

from graphql import (GraphQLArgument, GraphQLField, GraphQLObjectType, GraphQLSchema, GraphQLString, graphql, parse,
                     print_ast)

RAN = GraphQLField(
    GraphQLString,
    args={"note": GraphQLArgument(GraphQLString)},
    resolver=lambda name, info, note=None: f"{name} {info.operation.name.value}",
)
SCHEMA = GraphQLSchema(GraphQLObjectType("Query", {"ran": RAN}), GraphQLObjectType("Mutation", {"ran": RAN}))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parameters = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.execute({name: values[0] for name, values in parameters.items()})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.execute({"query": body} if self.headers["content-type"] == "application/graphql" else json.loads(body))

    def execute(self, request):
        result = graphql(SCHEMA, request["query"], self.server.name, operation_name=request.get("operationName"))
        body = json.dumps({"data": result.data} if not result.errors else str(result.errors)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(name, address="127.0.0.1:0"):
    host, port = address.split(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    server.name = name
    print(server.server_address[1], flush=True)
    server.serve_forever()


BOTH = "query GetCart { ran } query Other { ran } mutation GetCarts { ran }"
DOCUMENTS = [
    # Document, operationName, which one runs.
    ("query GetCart { ran }", None, "GetCart"),
    ("query Other { ran }", None, "Other"),
    (BOTH, "GetCart", "GetCart"),
    (BOTH, "Other", "Other"),
    (BOTH, "GetCarts", "GetCarts"),
    ("mutation GetCart { ran }", None, "GetCart"),
    ("# query GetCart { ran }\nquery Other { ran }", None, "Other"),
    ('query Other { ran(note: "query GetCart { ran }") }', None, "Other"),
    ("fragment GetCart on Query { ran } query Other { ...GetCart }", None, "Other"),
    ("\ufeffquery,,GetCart($note: String = \"{\") { ran(note: $note) }", None, "GetCart"),
]


def call(address):
    connection = http.client.HTTPConnection(address, timeout=20)
    for document, operation, runs in DOCUMENTS:
        wanted = {"data": {"ran": f"{'local' if runs == 'GetCart' else 'app'} {runs}"}}
        for text in (document, print_ast(parse(document))):
            request = {"query": text} | ({"operationName": operation} if operation else {})
            sends = [("POST", "/graphql", json.dumps(request), {"content-type": "application/json"})]
            if "mutation" not in document:
                sends.append(("GET", "/graphql?" + urllib.parse.urlencode(request), None, {}))
            if operation is None:
                sends.append(("POST", "/graphql", text.encode(), {"content-type": "application/graphql"}))
            for method, target, body, headers in sends:
                connection.request(method, target, body, headers)
                got = json.loads(connection.getresponse().read())
                assert got == wanted, (method, text, operation, got)


{"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])
