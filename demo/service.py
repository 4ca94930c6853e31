"""A service of the demo: answers every request with one line. usage: service.py ADDRESS orders|stock"""
import http.server
import sys

address, name = sys.argv[1:]
LINE = {"orders": b"orders: 3 parcels to send\n", "stock": b"stock: 12 parcels left\n"}[name]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(LINE)))
        self.end_headers()
        self.wfile.write(LINE)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer((address, 80), Handler).serve_forever()
