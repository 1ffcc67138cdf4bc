// Included before every source (CMakeLists.txt): functions that newer glibcs gave a new version of are taken in the old
// one, so that a library built here loads wherever torch's own wheel does (glibc 2.28, docs/decisions/0004). The code that
// runs is the same: 2.34 only moved pthread's functions into libc, 2.29's log only leaves out the call of matherr.
#pragma once
#include <features.h>

#ifdef __GLIBC__
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_2.2.5");
#endif
