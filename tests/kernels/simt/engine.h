// What scheduler.cpp and memory.cpp know of each other.
#pragma once
#include <setjmp.h>

#include <deque>
#include <vector>

#include "simt.h"

namespace simt {

constexpr size_t STACK_BYTES = 128 << 10, PAGE = 4096;
constexpr int MAX_THREADS = 1024;

struct Copy {  // a cp.async under way
    char* to;
    const char* from;
    size_t bytes, from_global;
};

struct Thread : Builtins {
    int id = 0;
    jmp_buf context;
    bool started = false, done = false, dependency_met = false;
    const char* op = nullptr;  // what it waits at
    Site site{};
    unsigned mask = 0, warp_epoch = 0;  // warp_epoch counts the __syncwarp of its warp
    void* args = nullptr;
    std::vector<Copy> open_group;
    std::deque<std::vector<Copy>> groups;
};

extern Thread* current;            // the running thread, null while the scheduler runs
extern char* stacks;               // MAX_THREADS of STACK_BYTES
extern unsigned epoch, block_epoch;  // count block barriers, never restart; block_epoch is the running block's first

void set_up_memory();
void begin_kernel(size_t dynamic_bytes);
void begin_block();  // poisons shared memory
std::string end_kernel();
std::string name_of(int thread);

}  // namespace simt
