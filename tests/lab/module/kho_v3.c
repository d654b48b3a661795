// SPDX-License-Identifier: GPL-2.0
/*
 * kho_v3 - the sysfs ABI of the KHO v3 series on a stateless KHO kernel
 *
 * The v3 series (January 2024) was never merged. This module offers its files
 * on top of mainline KHO (written for 7.3), so that a v3 client can be tested
 * with a real kexec:
 *
 *   /sys/kernel/kho/{active,dt_max,scratch_phys,scratch_len,dt}
 *   /sys/firmware/kho/dt		in a kernel that a tree was handed to
 *
 * Load it in both kernels. It cannot be unloaded: v3 is no module either, and
 * KHO memory can be restored only once in a boot.
 *
 * Parameters, all writable at runtime in /sys/module/kho_v3/parameters:
 *
 *   veto	a producer refuses: activation fails, the log says -1
 *   slow_ms	serialization lasts this much longer, with the mutex held
 *   ranges	how many memory ranges the tree describes (default 64, rounded
 *		up to even). 650000 make a tree of 9.9 MiB, 655400 outgrow the
 *		default dt_max. 0: no producer, the tree is its root's
 *		compatible. The first 2 * RING_PAGES_MAX ranges are distinct,
 *		real and preserved; from there on the same ones repeat, so that
 *		a big tree needs no big memory.
 *
 * Log lines to look for:
 *
 *   kho_v3: active, tree of N bytes, N pages preserved
 *   kho_v3: kho failed to serialize state: N
 *   kho_v3: restored tree of N bytes
 *   kho_v3: all N pages intact
 *   kho_v3: N of N pages damaged
 *   kho_v3: no tree from the previous kernel
 *   kho_v3: no scratch region, cannot activate: -N
 *
 * Like v3, dt is read and removed under one mutex: a read of dt that meets a
 * write of 0 to active deadlocks (dt_read() against kernfs_drain()), and
 * nothing but a reset helps.
 *
 * kstrtobool() is the running kernel's: that of 7.3 also takes t, f, e and d.
 *
 * What v3 does and this module does not:
 *
 *   - kexec_file_load copies the tree into the image there. Here the tree
 *     travels on its own, so the order of load and activate does not matter,
 *     and an image loaded before an abort hands nothing over after it.
 *   - A load fails there for a range in scratch and for a tree that does not
 *     fit. Here the load knows nothing of the tree.
 *   - A failed activation leaks the tree there.
 *   - ftrace holds trace_types_lock while active there, and reports a tree
 *     that outgrew dt_max as NOTIFY_BAD: v3's log then says -1, and -3 only if
 *     the space ran out outside the producer. Here it is always -3.
 *   - scratch is one region there. Mainline has several; this is the largest.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/kexec_handover.h>
#include <linux/kho/abi/kexec_handover.h>
#include <linux/kobject.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/seq_file.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/uio.h>
#include <linux/vmalloc.h>

/* What stands in mainline's tree for ours, and the mark of its layout. */
#define KHO_V3_SUBTREE		"kho_v3"
#define KHO_V3_MAGIC		0x313033765f6f686bULL	/* kho_v301 */

#define RING_PAGES_MAX		1024UL

/* v3 describes a ring page by the page and its struct buffer_page. */
#define BUFFER_PAGE_SIZE	0x38UL
#define BUFFER_PAGES_PER_PAGE	(PAGE_SIZE / BUFFER_PAGE_SIZE)

struct kho_mem {
	u64 addr;
	u64 len;
};

struct kho_v3_handover {
	u64 magic;
	u64 seed;
	struct kho_vmalloc dt;
	struct kho_vmalloc ring;
};

static struct {
	struct mutex lock;	/* the v3 lock: all below, and reads of dt */
	struct kobject *kobj;
	bool active;
	u64 dt_max;
	u64 scratch_phys;
	u64 scratch_len;
	void *dt;
	void *ring;
	struct kho_v3_handover *handover;
} kho = {
	.lock = __MUTEX_INITIALIZER(kho.lock),
	.dt_max = 10 * 1024 * 1024,
};

static bool veto;
module_param(veto, bool, 0644);
MODULE_PARM_DESC(veto, "refuse to serialize");

static unsigned int slow_ms;
module_param(slow_ms, uint, 0644);
MODULE_PARM_DESC(slow_ms, "extra duration of serialization, in milliseconds");

static unsigned int ranges = 64;
module_param(ranges, uint, 0644);
MODULE_PARM_DESC(ranges, "number of memory ranges in the tree");

/*
 * A flattener: libfdt is not exported to modules. Same layout and same notion
 * of "no space" as libfdt's sequential writer; only the strings stand in
 * another order.
 */

#define FDT_MAGIC		0xd00dfeed
#define FDT_BEGIN_NODE		1
#define FDT_END_NODE		2
#define FDT_PROP		3
#define FDT_END			9
#define FDT_ERR_NOSPACE		3

struct fdt_header {
	__be32 magic;
	__be32 totalsize;
	__be32 off_dt_struct;
	__be32 off_dt_strings;
	__be32 off_mem_rsvmap;
	__be32 version;
	__be32 last_comp_version;
	__be32 boot_cpuid_phys;
	__be32 size_dt_strings;
	__be32 size_dt_struct;
};

/* The header, aligned for the memory reservation map, which is one empty entry. */
#define FDT_RSVMAP_OFFSET	ALIGN(sizeof(struct fdt_header), 16)
#define FDT_STRUCT_OFFSET	(FDT_RSVMAP_OFFSET + 16)

/* Every property name there is, so the strings need no bookkeeping. */
static const char fdt_strings[] = "compatible\0events\0trace-flags\0cpu\0mem";

struct fdt_writer {
	void *buf;	/* zeroed: padding and the reservation map rely on it */
	size_t size;
	size_t len;
	int err;
};

static void *fdt_grow(struct fdt_writer *w, size_t len)
{
	void *p = w->buf + w->len;

	len = ALIGN(len, 4);
	if (w->err || len > w->size - w->len) {
		w->err = -FDT_ERR_NOSPACE;
		return NULL;
	}
	w->len += len;
	return p;
}

static void fdt_u32(struct fdt_writer *w, u32 val)
{
	__be32 *p = fdt_grow(w, sizeof(*p));

	if (p)
		*p = cpu_to_be32(val);
}

static void fdt_begin_node(struct fdt_writer *w, const char *name)
{
	size_t len = strlen(name) + 1;
	char *p;

	fdt_u32(w, FDT_BEGIN_NODE);
	p = fdt_grow(w, len);
	if (p)
		memcpy(p, name, len);
}

static void fdt_end_node(struct fdt_writer *w)
{
	fdt_u32(w, FDT_END_NODE);
}

/* Room for a value of @len bytes, 4-byte aligned, or NULL if there is none. */
static void *fdt_property_room(struct fdt_writer *w, const char *name, size_t len)
{
	const char *s = fdt_strings;

	while (strcmp(s, name))
		s += strlen(s) + 1;

	fdt_u32(w, FDT_PROP);
	fdt_u32(w, len);
	fdt_u32(w, s - fdt_strings);
	return fdt_grow(w, len);
}

static void fdt_property(struct fdt_writer *w, const char *name, const void *val, size_t len)
{
	void *p = fdt_property_room(w, name, len);

	if (p)
		memcpy(p, val, len);
}

static void fdt_property_string(struct fdt_writer *w, const char *name, const char *val)
{
	fdt_property(w, name, val, strlen(val) + 1);
}

static int fdt_create(struct fdt_writer *w, void *buf, size_t size)
{
	*w = (struct fdt_writer){ .buf = buf, .size = size };
	fdt_grow(w, FDT_STRUCT_OFFSET);
	return w->err;
}

static int fdt_finish(struct fdt_writer *w)
{
	struct fdt_header *hdr = w->buf;
	size_t off_strings;
	char *strings;

	fdt_u32(w, FDT_END);
	off_strings = w->len;
	if (w->err || sizeof(fdt_strings) > w->size - off_strings)
		return -FDT_ERR_NOSPACE;

	strings = w->buf + off_strings;
	memcpy(strings, fdt_strings, sizeof(fdt_strings));

	*hdr = (struct fdt_header){
		.magic = cpu_to_be32(FDT_MAGIC),
		.totalsize = cpu_to_be32(off_strings + sizeof(fdt_strings)),
		.off_dt_struct = cpu_to_be32(FDT_STRUCT_OFFSET),
		.off_dt_strings = cpu_to_be32(off_strings),
		.off_mem_rsvmap = cpu_to_be32(FDT_RSVMAP_OFFSET),
		.version = cpu_to_be32(17),
		.last_comp_version = cpu_to_be32(16),
		.size_dt_strings = cpu_to_be32(sizeof(fdt_strings)),
		.size_dt_struct = cpu_to_be32(off_strings - FDT_STRUCT_OFFSET),
	};
	return 0;
}

static size_t fdt_totalsize(const void *fdt)
{
	return be32_to_cpu(((const struct fdt_header *)fdt)->totalsize);
}

/*
 * The producer: a ring buffer after ftrace's, in one vmalloc area. First the
 * data pages, then the pages that hold their descriptors.
 */

static u64 ring_phys(const void *p)
{
	return page_to_phys(vmalloc_to_page(p)) + offset_in_page(p);
}

/*
 * Each word is its own physical address under a random mask. A page that
 * arrives somewhere else, or that is left over from an earlier activation,
 * does not pass for intact.
 */
static void ring_fill(void *ring, unsigned long nr_pages, u64 seed)
{
	for (void *page = ring; page < ring + nr_pages * PAGE_SIZE; page += PAGE_SIZE) {
		u64 phys = ring_phys(page);
		u64 *words = page;

		for (int i = 0; i < PAGE_SIZE / sizeof(u64); i++)
			words[i] = seed ^ (phys + i * sizeof(u64));
	}
}

static unsigned long ring_damaged(const void *ring, unsigned long nr_pages, u64 seed)
{
	const void *end = ring + nr_pages * PAGE_SIZE;
	unsigned long damaged = 0;

	for (const void *page = ring; page < end; page += PAGE_SIZE) {
		u64 phys = ring_phys(page);
		const u64 *words = page;

		for (int i = 0; i < PAGE_SIZE / sizeof(u64); i++) {
			if (words[i] != (seed ^ (phys + i * sizeof(u64)))) {
				damaged++;
				break;
			}
		}
	}
	return damaged;
}

/* The pages @from up to @to of the tree's ring, two ranges for each. */
static void write_mem(struct fdt_writer *w, const void *ring, unsigned long data_pages,
		      unsigned long from, unsigned long to)
{
	struct kho_mem *mem;

	mem = fdt_property_room(w, "mem", (to - from) * 2 * sizeof(*mem));
	if (!mem)
		return;

	for (unsigned long i = from; i < to; i++) {
		unsigned long page = i % data_pages;
		unsigned long desc_page = data_pages + page / BUFFER_PAGES_PER_PAGE;
		struct kho_mem pair[] = {
			{
				.addr = ring_phys(ring + desc_page * PAGE_SIZE) +
					page % BUFFER_PAGES_PER_PAGE * BUFFER_PAGE_SIZE,
				.len = BUFFER_PAGE_SIZE,
			}, {
				.addr = ring_phys(ring + page * PAGE_SIZE),
				.len = PAGE_SIZE,
			},
		};

		/* A property is aligned to four bytes only. */
		memcpy(mem, pair, sizeof(pair));
		mem += 2;
	}
}

static void write_ftrace(struct fdt_writer *w, const void *ring, unsigned long data_pages,
			 unsigned long tree_pages)
{
	/* Fingerprint and type of an event; no one here reads them. */
	static const struct { u32 crc; u32 type; } events[] = {
		{ 1, 1 }, { 2, 2 }, { 0x1c291ca3, 300 },
	};
	const u32 trace_flags = 0x3354601;
	unsigned long nr_cpus = num_possible_cpus();
	unsigned long nth = 0;
	unsigned int cpu;

	fdt_begin_node(w, "ftrace");
	fdt_property_string(w, "compatible", "ftrace-v1");
	fdt_property(w, "events", events, sizeof(events));
	fdt_begin_node(w, "global-trace");
	fdt_property_string(w, "compatible", "ftrace,array-v1");
	fdt_property(w, "trace-flags", &trace_flags, sizeof(trace_flags));

	for_each_possible_cpu(cpu) {
		char name[sizeof("cpuffffffff")];

		snprintf(name, sizeof(name), "cpu%x", cpu);
		fdt_begin_node(w, name);
		fdt_property_string(w, "compatible", "ftrace,cpu-v1");
		fdt_property(w, "cpu", &cpu, sizeof(cpu));
		write_mem(w, ring, data_pages, tree_pages * nth / nr_cpus,
			  tree_pages * (nth + 1) / nr_cpus);
		fdt_end_node(w);
		nth++;
	}

	fdt_end_node(w);
	fdt_end_node(w);
}

/* Allocates kho.ring and adds it to the tree. */
static int produce(struct fdt_writer *w, unsigned long *nr_pages, u64 seed)
{
	unsigned long tree_pages = DIV_ROUND_UP(READ_ONCE(ranges), 2UL);
	unsigned long data_pages = min(tree_pages, RING_PAGES_MAX);

	/* NOTIFY_BAD, as notifier_to_errno() has it */
	if (READ_ONCE(veto))
		return -EPERM;

	*nr_pages = data_pages + DIV_ROUND_UP(data_pages, BUFFER_PAGES_PER_PAGE);
	if (!*nr_pages)
		return 0;

	kho.ring = vmalloc(*nr_pages * PAGE_SIZE);
	if (!kho.ring)
		return -ENOMEM;
	ring_fill(kho.ring, *nr_pages, seed);
	write_ftrace(w, kho.ring, data_pages, tree_pages);
	return w->err;
}

/* The active phase. All of it under kho.lock. */

static ssize_t dt_read(struct file *file, struct kobject *kobj, const struct bin_attribute *attr,
		       char *buf, loff_t pos, size_t count)
{
	/* v3's deadlock with abort is here, and meant to be. */
	mutex_lock(&kho.lock);
	memcpy(buf, attr->private + pos, count);
	mutex_unlock(&kho.lock);

	return count;
}

static struct bin_attribute dt_attr = __BIN_ATTR(dt, 0400, dt_read, NULL, 0);

/* Safe at any stage of an activation. */
static void kho_release(void)
{
	struct kho_v3_handover *h = kho.handover;

	if (h) {
		kho_remove_subtree(h);
		kho_unpreserve_vmalloc(&h->ring);
		kho_unpreserve_vmalloc(&h->dt);
		kho_unpreserve_free(h);
	}
	vfree(kho.ring);
	vfree(kho.dt);
	kho.handover = NULL;
	kho.ring = NULL;
	kho.dt = NULL;
}

static int preserve(void *area, struct kho_vmalloc *preservation)
{
	int err = kho_preserve_vmalloc(area, preservation);

	/* Its error path frees the list, but leaves the pointer to it. */
	if (err)
		preservation->first.phys = 0;
	return err;
}

/* Hand over what stands in kho.dt and kho.ring. */
static int hand_over(u64 seed)
{
	struct kho_v3_handover *h;
	int err;

	h = kho_alloc_preserve(sizeof(*h));
	if (IS_ERR(h))
		return PTR_ERR(h);
	kho.handover = h;
	h->magic = KHO_V3_MAGIC;
	h->seed = seed;

	err = preserve(kho.dt, &h->dt);
	if (!err && kho.ring)
		err = preserve(kho.ring, &h->ring);
	if (!err)
		err = kho_add_subtree(KHO_V3_SUBTREE, h, sizeof(*h));
	return err;
}

static int kho_serialize(void)
{
	u64 size = READ_ONCE(kho.dt_max);
	unsigned long nr_pages = 0;
	u64 seed = get_random_u64();
	struct fdt_writer w;
	int err;

	msleep(READ_ONCE(slow_ms));

	/*
	 * What the kvmalloc() and fdt_create() of v3 say to a size that is out
	 * of all proportion: no memory, and no valid argument.
	 */
	if (size > INT_MAX)
		return -ENOMEM;
	if (size < FDT_RSVMAP_OFFSET)
		return -EINVAL;

	/* v3 keeps the whole of dt_max, too, as long as it is active. */
	kho.dt = __vmalloc(size, GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN);
	if (!kho.dt)
		return -ENOMEM;

	err = fdt_create(&w, kho.dt, size);
	if (err)
		return err;
	fdt_begin_node(&w, "");
	fdt_property_string(&w, "compatible", "kho-v1");
	err = produce(&w, &nr_pages, seed);
	if (err)
		return err;
	fdt_end_node(&w);
	err = fdt_finish(&w);
	if (err)
		return err;

	err = hand_over(seed);
	if (err)
		return err;

	dt_attr.size = fdt_totalsize(kho.dt);
	dt_attr.private = kho.dt;
	err = sysfs_create_bin_file(kho.kobj, &dt_attr);
	if (err)
		return err;

	pr_info("active, tree of %zu bytes, %lu pages preserved\n", dt_attr.size, nr_pages);
	return 0;
}

static int kho_activate(void)
{
	int err = kho_serialize();

	if (err) {
		pr_err("kho failed to serialize state: %d\n", err);
		kho_release();
		return -EINVAL;
	}
	kho.active = true;
	return 0;
}

static void kho_abort(void)
{
	sysfs_remove_bin_file(kho.kobj, &dt_attr);
	kho_release();
	kho.active = false;
}

/* /sys/kernel/kho, in v3's order of checks. */

static ssize_t active_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	ssize_t len;

	mutex_lock(&kho.lock);
	len = sysfs_emit(buf, "%d\n", kho.active);
	mutex_unlock(&kho.lock);

	return len;
}

static ssize_t active_store(struct kobject *kobj, struct kobj_attribute *attr,
			    const char *buf, size_t count)
{
	int err = 0;
	bool val;

	if (kstrtobool(buf, &val))
		return -EINVAL;
	if (!kho.scratch_len)
		return -ENOMEM;

	mutex_lock(&kho.lock);
	if (val && !kho.active)
		err = kho_activate();
	else if (!val && kho.active)
		kho_abort();
	mutex_unlock(&kho.lock);

	return err ?: count;
}

static ssize_t dt_max_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "0x%llx\n", READ_ONCE(kho.dt_max));
}

static ssize_t dt_max_store(struct kobject *kobj, struct kobj_attribute *attr,
			    const char *buf, size_t count)
{
	u64 val;

	if (kstrtoull(buf, 0, &val))
		return -EINVAL;
	WRITE_ONCE(kho.dt_max, val);

	return count;
}

static ssize_t scratch_phys_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "0x%llx\n", kho.scratch_phys);
}

static ssize_t scratch_len_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "0x%llx\n", kho.scratch_len);
}

static struct kobj_attribute active_attr = __ATTR_RW_MODE(active, 0600);
static struct kobj_attribute dt_max_attr = __ATTR_RW_MODE(dt_max, 0600);
static struct kobj_attribute scratch_phys_attr = __ATTR_RO_MODE(scratch_phys, 0400);
static struct kobj_attribute scratch_len_attr = __ATTR_RO_MODE(scratch_len, 0400);

static const struct attribute *kho_attrs[] = {
	&active_attr.attr,
	&dt_max_attr.attr,
	&scratch_phys_attr.attr,
	&scratch_len_attr.attr,
	NULL
};

/*
 * Scratch. No symbol tells a module where it is; debugfs does, one region a
 * line. A mount of our own makes that independent of whether anybody has
 * mounted debugfs yet: systemd-modules-load.service is not ordered after it.
 */

#define SCRATCH_MAX 16

static int __init read_scratch(struct vfsmount *debugfs, const char *path, u64 *val)
{
	char buf[SCRATCH_MAX * sizeof("0x0123456789abcdef")];
	struct kvec kvec = { .iov_base = buf, .iov_len = sizeof(buf) - 1 };
	struct iov_iter iter;
	struct kiocb kiocb;
	struct file *file;
	char *next = buf;
	ssize_t len;
	int n = 0;

	file = file_open_root_mnt(debugfs, path, O_RDONLY, 0);
	if (IS_ERR(file))
		return PTR_ERR(file);

	/*
	 * kernel_read() refuses debugfs files, as they have no read_iter. This
	 * one is made by DEFINE_SHOW_ATTRIBUTE(), hence a seq_file.
	 */
	init_sync_kiocb(&kiocb, file);
	iov_iter_kvec(&iter, ITER_DEST, &kvec, 1, kvec.iov_len);
	len = seq_read_iter(&kiocb, &iter);
	filp_close(file, NULL);
	if (len < 0)
		return len;
	buf[len] = '\0';

	while (n < SCRATCH_MAX && next && *next) {
		if (kstrtoull(strsep(&next, "\n"), 0, &val[n++]))
			return -EINVAL;
	}
	return n;
}

static int __init find_scratch(void)
{
	u64 phys[SCRATCH_MAX], len[SCRATCH_MAX];
	struct file_system_type *type;
	struct vfsmount *debugfs;
	int n, ret;

	if (!kho_is_enabled())
		return -EOPNOTSUPP;
	type = get_fs_type("debugfs");
	if (!type)
		return -ENODEV;
	debugfs = kern_mount(type);
	if (IS_ERR(debugfs))
		return PTR_ERR(debugfs);

	/* Linux 7.4 calls it bootmem. */
	n = read_scratch(debugfs, "kho/out/bootmem_phys", phys);
	ret = n < 0 ? n : read_scratch(debugfs, "kho/out/bootmem_len", len);
	if (n == -ENOENT) {
		n = read_scratch(debugfs, "kho/out/scratch_phys", phys);
		ret = n < 0 ? n : read_scratch(debugfs, "kho/out/scratch_len", len);
	}
	kern_unmount(debugfs);
	if (ret < 0)
		return ret;

	for (int i = 0; i < min(n, ret); i++) {
		if (len[i] > kho.scratch_len) {
			kho.scratch_phys = phys[i];
			kho.scratch_len = len[i];
		}
	}
	return kho.scratch_len ? 0 : -ENOENT;
}

/* The other side: what the kernel before us handed over. */

static struct bin_attribute dt_in_attr = __BIN_ATTR(dt, 0400, sysfs_bin_attr_simple_read, NULL, 0);

static void __init expose_tree(const struct kho_vmalloc *preservation)
{
	const size_t max = preservation->total_pages * PAGE_SIZE;
	struct kobject *kobj;
	void *dt;

	dt = kho_restore_vmalloc(preservation);
	if (!dt) {
		pr_err("cannot restore the tree\n");
		return;
	}
	if (*(__be32 *)dt != cpu_to_be32(FDT_MAGIC) || fdt_totalsize(dt) > max) {
		pr_err("restored tree is damaged\n");
		goto err;
	}
	kobj = kobject_create_and_add("kho", firmware_kobj);
	if (!kobj)
		goto err;

	dt_in_attr.size = fdt_totalsize(dt);
	dt_in_attr.private = dt;
	if (sysfs_create_bin_file(kobj, &dt_in_attr)) {
		kobject_put(kobj);
		goto err;
	}
	pr_info("restored tree of %zu bytes\n", dt_in_attr.size);
	return;
err:
	vfree(dt);
}

static void __init check_ring(const struct kho_vmalloc *preservation, u64 seed)
{
	unsigned int nr_pages = preservation->total_pages;
	unsigned long damaged;
	void *ring;

	if (!nr_pages)
		return;
	ring = kho_restore_vmalloc(preservation);
	if (!ring) {
		pr_err("cannot restore the pages\n");
		return;
	}

	damaged = ring_damaged(ring, nr_pages, seed);
	if (damaged)
		pr_err("%lu of %u pages damaged\n", damaged, nr_pages);
	else
		pr_info("all %u pages intact\n", nr_pages);
	vfree(ring);
}

static void __init kho_restore(void)
{
	struct kho_v3_handover *h;
	phys_addr_t phys;
	size_t size;

	if (kho_retrieve_subtree(KHO_V3_SUBTREE, &phys, &size)) {
		pr_info("no tree from the previous kernel\n");
		return;
	}
	h = phys_to_virt(phys);
	if (size != sizeof(*h) || h->magic != KHO_V3_MAGIC) {
		pr_err("handover of an unknown layout\n");
		return;
	}

	expose_tree(&h->dt);
	check_ring(&h->ring, h->seed);
	kho_restore_free(h);
}

static int __init kho_v3_init(void)
{
	int err;

	err = find_scratch();
	if (err)
		pr_info("no scratch region, cannot activate: %d\n", err);

	kho.kobj = kobject_create_and_add("kho", kernel_kobj);
	if (!kho.kobj)
		return -ENOMEM;
	err = sysfs_create_files(kho.kobj, kho_attrs);
	if (err) {
		kobject_put(kho.kobj);
		return err;
	}

	/* Last, as it works only once: nothing after it may fail. */
	kho_restore();
	return 0;
}
module_init(kho_v3_init);

MODULE_DESCRIPTION("sysfs ABI of the KHO v3 series, for tests");
MODULE_LICENSE("GPL");
