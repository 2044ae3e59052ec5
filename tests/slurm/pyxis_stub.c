/* Stands in for pyxis (https://github.com/NVIDIA/pyxis), the SPANK plugin that runs a step's tasks inside a container image. It takes the
   same words of srun and sbatch and starts no container: a task finds what was asked for in its environment, as STUB_CONTAINER_IMAGE and so on.
   The few SPANK types are declared here, as in slurm/spank.h, because SLURM_VERSION is all that a plugin needs to match (-DSLURM_VERSION=0x160508). */

#include <stddef.h>
#include <string.h>

typedef struct spank_handle *spank_t;
struct spank_option {
    const char *name, *arginfo, *usage;
    int has_arg, val;
    int (*callback)(int val, const char *word, int remote);
};
int spank_option_register(spank_t, struct spank_option *);
int spank_remote(spank_t);
int spank_setenv(spank_t, const char *name, const char *value, int overwrite);

const char plugin_name[] = "pyxis_stub", plugin_type[] = "spank";
const unsigned int plugin_version = SLURM_VERSION;

static const char *const names[] = {"image", "mounts", "workdir", "name", "save", "remap-root", "no-mount-home", "mount-home", "writable", "env"};
static const char *const variables[] = {"STUB_CONTAINER_IMAGE", "STUB_CONTAINER_MOUNTS", "STUB_CONTAINER_WORKDIR", "STUB_CONTAINER_NAME",
                                        "STUB_CONTAINER_SAVE", "STUB_CONTAINER_REMAP_ROOT", "STUB_CONTAINER_NO_MOUNT_HOME",
                                        "STUB_CONTAINER_MOUNT_HOME", "STUB_CONTAINER_WRITABLE", "STUB_CONTAINER_ENV"};
enum { COUNT = sizeof names / sizeof *names };
static char given[COUNT][4096], options[COUNT][64];

static int take(int val, const char *word, int remote) {
    (void)remote;
    if (*given[val]) /* as pyxis: specified multiple times */
        return -1;
    strncpy(given[val], word ? word : "yes", sizeof *given - 1);
    return 0;
}

int slurm_spank_init(spank_t spank, int count, char **words) {
    (void)count, (void)words;
    for (int i = 0; i < COUNT; i++) {
        int has_arg = strncmp(names[i], "remap", 5) && !strstr(names[i], "mount-home") && strcmp(names[i], "writable");
        strcat(strcpy(options[i], "container-"), names[i]);
        struct spank_option option = {options[i], has_arg ? "WORD" : NULL, "[stub of pyxis]", has_arg, i, take};
        if (spank_option_register(spank, &option))
            return -1;
    }
    return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **words) {
    (void)count, (void)words;
    for (int i = 0; i < COUNT && spank_remote(spank) == 1; i++)
        if (*given[i])
            spank_setenv(spank, variables[i], given[i], 1);
    return 0;
}
