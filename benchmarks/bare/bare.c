/* What a machine takes for the operations under a sandbox, with no sandbox at all.
 *
 * bare apart N         a hundred bytes to a process on another core and back, over a socketpair
 * bare together N      the same with both processes on one core
 * bare crowd N PAGES   a hundred bytes to one of a thousand processes after another and back, 64 on their way at a time;
 *                      each process then writes to so many pages of its own; the mean of each thousand
 * bare fork N MIB      fork a process that has touched MIB mebibytes, which ends at once, and reap it
 * bare namespace N MIB the same into a new process namespace (and a user namespace, where that takes one)
 *
 * Prints microseconds, one a line. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Stay on the core that comes after `skipped` others of those that this process may use. */
static void stay_on(int skipped) {
    cpu_set_t cores, one;
    if (sched_getaffinity(0, sizeof cores, &cores) != 0) fail("sched_getaffinity");
    int core = 0;
    for (; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &cores) && skipped-- == 0) break;
    if (core == CPU_SETSIZE) {
        fprintf(stderr, "there is one core only\n");
        exit(1);
    }
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) fail("sched_setaffinity");
}

static void ping_pong(int times, int core) {
    int ends[2];
    char bytes[256] = {0};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) fail("socketpair");
    pid_t other = fork();
    if (other < 0) fail("fork");
    if (other == 0) {
        stay_on(core);
        close(ends[0]);
        ssize_t size;
        while ((size = read(ends[1], bytes, sizeof bytes)) > 0)
            if (write(ends[1], bytes, size) != size) break;
        _exit(0);
    }
    stay_on(0);
    close(ends[1]);
    for (int i = 0; i < times; i++) {
        double start = now();
        if (write(ends[0], bytes, 100) != 100 || read(ends[0], bytes, sizeof bytes) != 100) fail("ping");
        printf("%.2f\n", now() - start);
    }
    close(ends[0]);
    waitpid(other, NULL, 0);
}

static void crowd(int times, size_t pages) {
    enum { PROCESSES = 1000, ON_THEIR_WAY = 64, PAGE = 4096, LINE = 64 };
    static int channels[PROCESSES];
    static pid_t processes[PROCESSES];
    char bytes[256] = {0};
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) fail("getrlimit");
    files.rlim_cur = files.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &files) != 0) fail("setrlimit");
    for (int i = 0; i < PROCESSES; i++) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) fail("socketpair");
        if ((processes[i] = fork()) < 0) fail("fork");
        if (processes[i] == 0) {
            char *own = mmap(NULL, (pages + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (own == MAP_FAILED) fail("mmap");
            ssize_t size;
            while ((size = read(ends[1], bytes, sizeof bytes)) > 0) {
                for (size_t page = 0; page < pages; page++) own[page * PAGE + page * LINE % PAGE]++;
                if (write(ends[1], bytes, size) != size) break;
            }
            _exit(0);
        }
        close(ends[1]);
        channels[i] = ends[0];
    }
    double start = now();
    for (int i = 0; i < times + PROCESSES; i++) { /* in the first round pages are new */
        if (write(channels[i % PROCESSES], bytes, 100) != 100) fail("write");
        int from = (i + PROCESSES - ON_THEIR_WAY + 1) % PROCESSES;
        if (i + 1 >= ON_THEIR_WAY && read(channels[from], bytes, sizeof bytes) != 100) fail("read");
        if (i % PROCESSES == PROCESSES - 1) {
            if (i >= PROCESSES) printf("%.2f\n", (now() - start) / PROCESSES);
            start = now();
        }
    }
    for (int i = 0; i < PROCESSES; i++) kill(processes[i], SIGKILL);
    for (int i = 0; i < PROCESSES; i++) waitpid(processes[i], NULL, 0);
}

static void start_processes(int times, size_t mebibytes, unsigned long flags) {
    size_t size = mebibytes << 20;
    char *memory = mmap(NULL, size ? size : 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    memset(memory, 1, size);
    for (int i = 0; i < times; i++) {
        double start = now();
        long child = syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);
        if (child < 0) fail("clone");
        if (child == 0) _exit(0);
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {}
        printf("%.2f\n", now() - start);
    }
}

int main(int count, char **words) {
    if (count < 3) return 2;
    int times = atoi(words[2]);
    size_t amount = count > 3 ? strtoul(words[3], NULL, 10) : 0; /* pages or mebibytes */
    if (strcmp(words[1], "apart") == 0) ping_pong(times, 1);
    else if (strcmp(words[1], "together") == 0) ping_pong(times, 0);
    else if (strcmp(words[1], "crowd") == 0) crowd(times, amount);
    else if (strcmp(words[1], "fork") == 0) start_processes(times, amount, 0);
    else if (strcmp(words[1], "namespace") == 0)
        start_processes(times, amount, CLONE_NEWPID | (geteuid() == 0 ? 0 : CLONE_NEWUSER));
    else return 2;
    return 0;
}
