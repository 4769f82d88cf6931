"""twisted.web; answers each request with a constant."""

from twisted.internet import asyncioreactor

asyncioreactor.install()

from twisted.internet import reactor  # noqa: E402
from twisted.web.resource import Resource  # noqa: E402
from twisted.web.server import Site  # noqa: E402


class Constant(Resource):
    isLeaf = True

    def render(self, request):
        request.content.read()
        request.setHeader(b"content-type", b"application/json")
        return b'{"result":{}}'


site = Site(Constant())
site.log = lambda request: None
site.noisy = False
print("port", reactor.listenTCP(0, site, interface="127.0.0.1").getHost().port, flush=True)
reactor.run()
