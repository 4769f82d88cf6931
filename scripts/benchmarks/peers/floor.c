// The cost of the kernel: an epoll loop without logic. It answers handshakes with a fixed response and sends messages.
// A message on a connection to /echo returns to its sender; a message on any other connection goes to all connections.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 65536
static const char RESPONSE[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static int clients[MOST], count;
static char shaken[MOST], echoes[MOST];

static void answer(int fd, unsigned char *data, long size) {
    if (!shaken[fd]) {
        shaken[fd] = 1;
        echoes[fd] = memcmp(data, "GET /echo", 9) == 0;
        send(fd, RESPONSE, sizeof RESPONSE - 1, MSG_NOSIGNAL);
        return;
    }
    long at = 0;
    while (size - at >= 6) {
        long length = data[at + 1] & 127, start = at + 2;
        if (length == 126) length = data[at + 2] << 8 | data[at + 3], start = at + 4;
        unsigned char *mask = data + start, *payload = mask + 4;
        if (payload + length > data + size) return;
        for (long i = 0; i < length; i++) payload[i] ^= mask[i & 3];
        unsigned char *frame;  // the header overwrites the mask, which ends where the payload begins
        if (length < 126) frame = payload - 2, frame[0] = 0x81, frame[1] = length;
        else frame = payload - 4, frame[0] = 0x81, frame[1] = 126, frame[2] = length >> 8, frame[3] = length;
        long whole = payload + length - frame;
        if (echoes[fd]) send(fd, frame, whole, MSG_NOSIGNAL);
        else for (int i = 0; i < count; i++) send(clients[i], frame, whole, MSG_NOSIGNAL);
        at = payload + length - data;
    }
}

int main(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int port = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0), yes = 1;
    if (bind(port, (struct sockaddr *)&address, size) || listen(port, 4096)) return 1;
    getsockname(port, (struct sockaddr *)&address, &size);
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = port}, ready[256];
    epoll_ctl(poll, EPOLL_CTL_ADD, port, &event);
    static unsigned char data[262144];
    for (;;) {
        int n = epoll_wait(poll, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == port) {
                int fresh = accept4(port, 0, 0, SOCK_NONBLOCK);
                if (fresh < 0 || fresh >= MOST) exit(1);
                setsockopt(fresh, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                clients[count++] = fresh;
                event.data.fd = fresh;
                epoll_ctl(poll, EPOLL_CTL_ADD, fresh, &event);
                continue;
            }
            long got = recv(fd, data, sizeof data, 0);
            if (got > 0) answer(fd, data, got);
            else if (got == 0) {  // serves one measurement: the first closed connection ends it
                exit(0);
            }
        }
    }
}
