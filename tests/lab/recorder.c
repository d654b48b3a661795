// SPDX-License-Identifier: LGPL-2.1-or-later
// The init of a guest that writes numbered records to /dev/vda, each with a flush. What the disk has confirmed is
// reported on ttyS0: the number, and the guest's uptime in seconds. Where the initrd has a guest agent, it runs too.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>

#define RECORD_BYTES 512
#define COPIES 64

static int fail(int serial, const char *what)
{
	dprintf(serial, "failed: %s: %m\n", what);
	return 1;
}

int main(void)
{
	const struct timespec pause = {.tv_nsec = 20000000};
	char *record = aligned_alloc(4096, 4096);
	struct timespec uptime;
	int serial, disk;

	mount("devtmpfs", "/dev", "devtmpfs", 0, "");
	serial = open("/dev/ttyS0", O_WRONLY | O_NOCTTY);
	if (fork() == 0) {
		execl("/usr/sbin/qemu-ga", "qemu-ga", "-m", "virtio-serial", "-p", "/dev/vport0p1", "-t", "/", NULL);
		_exit(1);
	}
	disk = open("/dev/vda", O_WRONLY | O_DIRECT | O_SYNC);
	if (disk < 0)
		return fail(serial, "open");
	for (unsigned int number = 0;; number++) {
		for (int copy = 0; copy < COPIES; copy++) {
			char text[16];

			snprintf(text, sizeof(text), "%07u\n", number);
			memcpy(record + copy * (RECORD_BYTES / COPIES), text, RECORD_BYTES / COPIES);
		}
		if (pwrite(disk, record, RECORD_BYTES, (off_t)number * RECORD_BYTES) != RECORD_BYTES)
			return fail(serial, "write");
		clock_gettime(CLOCK_BOOTTIME, &uptime); // what /proc/uptime shows
		dprintf(serial, "record %u %lld.%02ld\n", number, (long long)uptime.tv_sec, uptime.tv_nsec / 10000000);
		nanosleep(&pause, NULL);
	}
}
