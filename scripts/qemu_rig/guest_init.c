/*
 * The only program of the rig's Linux guest, run as process 1. It writes memory at a rate that is asked for, checks every
 * page that it has written, and says every millisecond that it is alive.
 *
 *   ttyS0 (console)  READY, BAD and answers go out; commands come in, one a line:
 *                      check      look at every page now, then "CHECKED pages N bad N"
 *                      rate N     write N MiB/s from here on
 *                      status     "STATUS written N checked N bad N reads N log N"
 *                      where N    "PAGE N at ADDRESS": the guest-physical address of page N
 *                      clock      "CLOCK NS": the wall clock
 *                      stop       power off
 *   ttyS1            "b SEQUENCE CLOCK_NS", one a period; on ttyS0 when there is no second port
 *   /dev/vda         if asked for: a log of records, and data that is read over and over (layout: disk.py)
 *
 * Every word of a page follows from the page's number and its version, and versions are kept in a table elsewhere: a page
 * that was damaged, lost or is older than it should be differs from what the table says.
 *
 * Where there is a /usr/sbin/qemu-ga it is started; it calls this program as /sbin/hwclock.
 *
 * Arguments (kernel command line, behind "--"): memory=MiB hot=MiB hot_percent=N rate=MiB/s check=MiB/s period_us=N
 *   log_ms=N (0: no log) read_mib=N (0: no reading). Of all writes, hot_percent go to the first "hot" MiB.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/rtc.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    WORDS = PAGE / 8,
    PAGES_PER_MIB = (1 << 20) / PAGE,
    SECTOR = 512,
    LANES = 64,          /* one for each incarnation, modulo */
    LANE_RECORDS = 8192, /* then a lane begins again */
    READ_BYTES = 1 << 20,
    READ_SLOTS = 8,
    REQUESTED_SLICE = 4096, /* pages that a requested check looks at before the next writes are due */
};
static const uint64_t SECOND_NS = 1000000000, TICK_NS = 10000000;
static const uint64_t STEP = 0x9E3779B97F4A7C15; /* 2^64 divided by the golden ratio, as in splitmix64 */
static const char *INCARNATION = "/sys/firmware/qemu_fw_cfg/by_name/opt/rig/incarnation/raw";

typedef uint64_t page_t[WORDS];

static struct {
    uint64_t memory, hot, hot_percent, rate, check, period_us, log_ms, read_mib;
} option = {.memory = 64, .hot = 64, .check = 32, .period_us = 1000};

static _Atomic uint64_t rate_mib, written, checked, bad, reads, records;
static atomic_bool check_requested;
static page_t *memory;
static uint32_t *version_of;
static uint64_t pages;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

static void sleep_until(uint64_t at_ns)
{
    struct timespec at = {at_ns / SECOND_NS, at_ns % SECOND_NS};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
}

/* One line, in one write: lines of different threads do not mix. */
static void say(int fd, const char *format, ...)
{
    char line[200];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    for (int done = 0; done < length;) {
        ssize_t part = write(fd, line + done, length - done);
        if (part < 0 && errno != EINTR && errno != EAGAIN)
            return;
        done += part > 0 ? part : 0;
    }
}

static void die(const char *what)
{
    say(1, "FAILED %s: %s\n", what, strerror(errno));
    sleep(1); /* until the console has it */
    reboot(RB_POWER_OFF);
}

/* Pages */

static uint64_t scattered(uint64_t word)
{
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
    word = (word ^ word >> 27) * 0x94D049BB133111EB;
    return word ^ word >> 31;
}

static void fill(uint64_t *page, uint64_t number, uint64_t version)
{
    uint64_t value = scattered(number << 32 | version);
    page[0] = number;
    page[1] = version;
    for (int i = 2; i < WORDS; i++)
        page[i] = value += STEP;
}

/* The first word that is not what it should be, or WORDS. */
static int first_wrong(const uint64_t *page, uint64_t number, uint64_t version)
{
    uint64_t value = scattered(number << 32 | version);
    if (page[0] != number || page[1] != version)
        return page[0] == number;
    for (int i = 2; i < WORDS; i++)
        if (page[i] != (value += STEP))
            return i;
    return WORDS;
}

/* Say what is wrong with a page, and put it right so that it is said once. */
static void report(const char *kind, uint64_t *page, uint64_t number, uint64_t version, int word)
{
    bad++;
    int whole = first_wrong(page, page[0], page[1]) == WORDS;
    say(1, "BAD %s %llu %s: word %d, has page %llu version %llu, wanted version %llu\n", kind,
        (unsigned long long)number, whole ? "stale" : "damaged", word, (unsigned long long)page[0],
        (unsigned long long)page[1], (unsigned long long)version);
    fill(page, number, version);
}

static void check_page(uint64_t number)
{
    int word = first_wrong(memory[number], number, version_of[number]);
    if (word != WORDS)
        report("page", memory[number], number, version_of[number], word);
    checked++;
}

static uint64_t next_page(void)
{
    static uint64_t state = 1;
    uint64_t choice = scattered(state += STEP), hot_pages = option.hot * PAGES_PER_MIB;
    uint64_t among = choice % 100 < option.hot_percent ? hot_pages : pages;
    return (choice >> 8) % among;
}

/* Writes and checks, all in this one thread: so no page is looked at while it is half written. */
static _Noreturn void *work(void *unused)
{
    (void)unused;
    uint64_t cursor = 0, left = 0, requested_bad = 0, due_ns = now_ns(), write_credit = 0, check_credit = 0;
    for (;;) {
        write_credit += atomic_load(&rate_mib) * PAGES_PER_MIB * TICK_NS;
        for (; write_credit >= SECOND_NS; write_credit -= SECOND_NS) {
            uint64_t number = next_page();
            fill(memory[number], number, ++version_of[number]);
            written++;
        }
        if (!left && atomic_exchange(&check_requested, false)) {
            left = pages;
            requested_bad = bad;
        }
        check_credit += option.check * PAGES_PER_MIB * TICK_NS;
        uint64_t slice = check_credit / SECOND_NS;
        check_credit %= SECOND_NS;
        if (left)
            slice = left < REQUESTED_SLICE ? left : REQUESTED_SLICE;
        for (uint64_t i = 0; i < slice; i++, cursor = (cursor + 1) % pages)
            check_page(cursor);
        if (left && !(left -= slice))
            say(1, "CHECKED pages %llu bad %llu\n", (unsigned long long)pages,
                (unsigned long long)(bad - requested_bad));
        due_ns += TICK_NS;
        if (left)
            due_ns = now_ns(); /* a requested check runs at full speed */
        else if (now_ns() < due_ns)
            sleep_until(due_ns);
        else
            due_ns = now_ns(); /* slower than asked for; nothing is made up for later */
    }
}

/* Beats */

static _Noreturn void *beat(void *unused)
{
    (void)unused;
    struct termios raw;
    int fd = open("/dev/ttyS1", O_WRONLY | O_NOCTTY);
    if (fd >= 0 && tcgetattr(fd, &raw) == 0) {
        cfmakeraw(&raw);
        cfsetspeed(&raw, B115200);
        tcsetattr(fd, TCSANOW, &raw);
    } else {
        fd = 1; /* the port is not there */
    }
    struct sched_param before_everything_else = {.sched_priority = 50};
    pthread_setschedparam(pthread_self(), SCHED_FIFO, &before_everything_else);
    uint64_t due_ns = now_ns();
    for (uint64_t sequence = 0;; sequence++) {
        uint64_t at_ns = now_ns();
        say(fd, "b %llu %llu\n", (unsigned long long)sequence, (unsigned long long)at_ns);
        due_ns += option.period_us * 1000;
        if (due_ns < at_ns)
            due_ns = at_ns; /* late: no burst follows */
        sleep_until(due_ns);
    }
}

/* The disk */

/* The number that the QEMU of this moment was given; it changes when the guest has moved. */
static uint64_t incarnation(void)
{
    char text[24] = "";
    int fd = open(INCARNATION, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (read(fd, text, sizeof text - 1) < 0)
            text[0] = 0;
        close(fd);
    }
    return strtoull(text, NULL, 10);
}

static _Noreturn void *log_lines(void *unused)
{
    (void)unused;
    int fd = open("/dev/vda", O_WRONLY | O_DIRECT);
    char *sector = aligned_alloc(SECTOR, SECTOR);
    if (fd < 0 || !sector)
        die("the log on /dev/vda");
    uint64_t in_lane = 0, lane_before = LANES;
    for (;;) {
        uint64_t who = incarnation(), lane = who % LANES;
        in_lane = lane == lane_before ? (in_lane + 1) % LANE_RECORDS : 0;
        lane_before = lane;
        memset(sector, 0, SECTOR);
        snprintf(sector, SECTOR, "log %llu %llu %llu\n", (unsigned long long)records, (unsigned long long)now_ns(),
                 (unsigned long long)who);
        if (pwrite(fd, sector, SECTOR, (lane * LANE_RECORDS + in_lane) * SECTOR) != SECTOR)
            die("writing the log");
        records++;
        usleep(option.log_ms * 1000);
    }
}

/* Reads the data into a ring of slots, past the page cache, and looks at all slots after each read. */
static _Noreturn void *read_data(void *unused)
{
    (void)unused;
    enum { SLOT_PAGES = READ_BYTES / PAGE };
    static _Alignas(PAGE) page_t slot[READ_SLOTS][SLOT_PAGES];
    uint64_t holds[READ_SLOTS] = {0}, begin = (uint64_t)LANES * LANE_RECORDS * SECTOR;
    int fd = open("/dev/vda", O_RDONLY | O_DIRECT);
    if (fd < 0)
        die("the data on /dev/vda");
    for (uint64_t next = 0;; next++) {
        uint64_t part = next % option.read_mib, into = next % READ_SLOTS;
        if (pread(fd, slot[into], READ_BYTES, begin + part * READ_BYTES) != READ_BYTES)
            die("reading the data");
        holds[into] = part;
        reads++;
        for (uint64_t i = 0; i < READ_SLOTS && i <= next; i++)
            for (int j = 0; j < SLOT_PAGES; j++) {
                uint64_t number = holds[i] * SLOT_PAGES + j;
                int word = first_wrong(slot[i][j], number, 0);
                if (word != WORDS)
                    report("disk-page", slot[i][j], number, 0, word);
            }
    }
}

/* Commands */

static uint64_t physical_address(const void *at)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, sizeof entry, (uintptr_t)at / PAGE * sizeof entry) != sizeof entry)
        die("where a page is");
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static void obey(void)
{
    char line[100];
    unsigned long long number;
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "check\n"))
            atomic_store(&check_requested, true);
        else if (sscanf(line, "rate %llu", &number) == 1) {
            atomic_store(&rate_mib, number);
            say(1, "RATE %llu\n", number);
        } else if (!strcmp(line, "status\n"))
            say(1, "STATUS written %llu checked %llu bad %llu reads %llu log %llu\n", (unsigned long long)written,
                (unsigned long long)checked, (unsigned long long)bad, (unsigned long long)reads,
                (unsigned long long)records);
        else if (sscanf(line, "where %llu", &number) == 1 && number < pages)
            say(1, "PAGE %llu at %llu\n", number, (unsigned long long)physical_address(memory[number]));
        else if (!strcmp(line, "clock\n")) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            say(1, "CLOCK %llu\n", (unsigned long long)(now.tv_sec * SECOND_NS + now.tv_nsec));
        } else if (!strcmp(line, "stop\n"))
            reboot(RB_POWER_OFF);
        else
            say(1, "UNKNOWN %s", line);
    }
}

/* The guest agent */

static const char *AGENT = "/usr/sbin/qemu-ga";

static void start_agent(void)
{
    glob_t ports; /* one at most; its number is that of the device among all of virtio's */
    if (access(AGENT, X_OK) || glob("/dev/vport*p*", 0, NULL, &ports))
        return;
    mkdir("/run", 0755);
    pid_t child = fork();
    if (child < 0)
        die("starting the guest agent");
    if (child == 0) {
        int quiet = open("/dev/null", O_RDWR); /* the console is for what the test reads */
        for (int fd = 0; fd < 3; fd++)
            dup2(quiet, fd);
        execl(AGENT, "qemu-ga", "-m", "virtio-serial", "-p", ports.gl_pathv[0], "-t", "/run", NULL);
        _exit(127);
    }
}

/* As the agent calls it, "hwclock -w": the hardware's clock is set to the system's. */
static int set_hardware_clock(void)
{
    time_t now = time(NULL);
    struct tm *utc = gmtime(&now);
    struct rtc_time set = {.tm_sec = utc->tm_sec, .tm_min = utc->tm_min, .tm_hour = utc->tm_hour,
                           .tm_mday = utc->tm_mday, .tm_mon = utc->tm_mon, .tm_year = utc->tm_year};
    int fd = open("/dev/rtc0", O_RDONLY | O_CLOEXEC);
    return fd < 0 || ioctl(fd, RTC_SET_TIME, &set);
}

/* Start */

static void load_modules(void)
{
    char path[100];
    FILE *order = fopen("/modules/order", "r");
    while (order && fscanf(order, "%99s", path) == 1) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            die(path);
        close(fd);
    }
}

static void read_options(int count, char **arguments)
{
    static const struct {
        const char *name;
        uint64_t *value;
    } known[] = {
        {"memory", &option.memory}, {"hot", &option.hot},     {"hot_percent", &option.hot_percent},
        {"rate", &option.rate},     {"check", &option.check}, {"period_us", &option.period_us},
        {"log_ms", &option.log_ms}, {"read_mib", &option.read_mib},
    };
    for (int i = 1; i < count; i++) {
        char *value = strchr(arguments[i], '=');
        size_t length = value ? (size_t)(value - arguments[i]) : 0;
        for (size_t k = 0; value && k < sizeof known / sizeof *known; k++)
            if (strlen(known[k].name) == length && !strncmp(known[k].name, arguments[i], length))
                *known[k].value = strtoull(value + 1, NULL, 10);
    }
    if (option.hot == 0 || option.hot > option.memory)
        option.hot = option.memory;
}

static void start(void *(*body)(void *))
{
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, body, NULL)))
        die("starting a thread");
}

int main(int count, char **arguments)
{
    if (strstr(arguments[0], "hwclock"))
        return set_hardware_clock();
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    struct termios console;
    if (tcgetattr(0, &console) == 0) {
        console.c_lflag &= ~ECHO;
        tcsetattr(0, TCSANOW, &console);
    }
    read_options(count, arguments);
    load_modules();
    pages = option.memory * PAGES_PER_MIB;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    version_of = calloc(pages, sizeof *version_of);
    if (memory == MAP_FAILED || !version_of)
        die("allocating memory");
    for (uint64_t number = 0; number < pages; number++)
        fill(memory[number], number, 0);
    atomic_store(&rate_mib, option.rate);
    start(beat);
    start(work);
    if (option.log_ms)
        start(log_lines);
    if (option.read_mib)
        start(read_data);
    start_agent();
    say(1, "READY pages %llu\n", (unsigned long long)pages);
    obey();
    die("reading the console");
}
