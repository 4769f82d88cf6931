// Node's http module; answers each request with a constant.
import http from "node:http";

const body = '{"result":{}}';
const server = http.createServer((request, response) => {
  request.resume();
  request.on("end", () => {
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": body.length });
    response.end(body);
  });
});
server.listen(0, "127.0.0.1", () => console.log("port", server.address().port));
