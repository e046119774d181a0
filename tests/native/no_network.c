/* Preloaded into a process and all that it starts: whatever asks for the network is noted in $NETWORK_LOG and refused.
 *
 * A look-up of a name, a connection, a datagram, to any address but one of this machine's own sockets in files. Python,
 * its libraries and PyTorch reach the network through these calls of the C library.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char* call) {
    const char* path = getenv("NETWORK_LOG");
    if (!path) return;
    const int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file < 0) return;
    if (write(file, call, strlen(call)) < 0 || write(file, "\n", 1) < 0) abort();
    close(file);
}

/* 1: the address is on a network, and has been noted. */
static int refused(const char* call, const struct sockaddr* address) {
    if (!address || (address->sa_family != AF_INET && address->sa_family != AF_INET6)) return 0;
    note(call);
    errno = EACCES;
    return 1;
}

int connect(int socket, const struct sockaddr* address, socklen_t length) {
    if (refused("connect", address)) return -1;
    int (*real)(int, const struct sockaddr*, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return real(socket, address, length);
}

ssize_t sendto(int socket, const void* data, size_t size, int flags, const struct sockaddr* address, socklen_t length) {
    if (refused("sendto", address)) return -1;
    ssize_t (*real)(int, const void*, size_t, int, const struct sockaddr*, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    return real(socket, data, size, flags, address, length);
}

ssize_t sendmsg(int socket, const struct msghdr* message, int flags) {
    if (refused("sendmsg", message->msg_name)) return -1;
    ssize_t (*real)(int, const struct msghdr*, int) = dlsym(RTLD_NEXT, "sendmsg");
    return real(socket, message, flags);
}

int getaddrinfo(const char* name, const char* service, const struct addrinfo* hints, struct addrinfo** found) {
    (void)name, (void)service, (void)hints, (void)found;
    note("getaddrinfo");
    return EAI_FAIL;
}

struct hostent* gethostbyname(const char* name) {
    (void)name;
    note("gethostbyname");
    return NULL;
}
