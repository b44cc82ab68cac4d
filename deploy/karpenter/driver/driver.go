// Package driver is the one seam between this cloud provider and whatever makes
// machines: docs/decisions/host-driver.md has the contract. Nothing else of the
// provider knows a cloud.
package driver

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Driver makes instances and ends them. Every call may be repeated: an instance is
// known by its name, and one name has one instance at a time.
type Driver interface {
	// Shapes that can be had for the class, also those that are sold out just now.
	Shapes(context.Context, Class) ([]Shape, error)
	// Create begins an instance, and tells of the one that is there.
	Create(context.Context, Order) (*Instance, error)
	// Get tells of the instance of this name.
	Get(ctx context.Context, name string) (*Instance, error)
	// Find tells of the instance with this provider id.
	Find(ctx context.Context, providerID string) (*Instance, error)
	// List tells of every instance that is not gone.
	List(context.Context) ([]Instance, error)
	// Delete begins the end of an instance; ErrNotFound: it is over.
	Delete(ctx context.Context, name string) error
}

// What a driver refuses with. Errors of other kinds are to be tried again.
var (
	// ErrNoCapacity: not of this shape, in this zone, of this capacity type, now.
	ErrNoCapacity = errors.New("out of capacity")
	// ErrNotFound: no such instance.
	ErrNotFound = errors.New("no such instance")
	// ErrInvalid: it would be refused again.
	ErrInvalid = errors.New("not a valid request")
	// ErrConflict: the name's instance is another, or is going.
	ErrConflict = errors.New("the name is taken")
)

// Class is what a HostClass says.
type Class struct {
	Name       string            `json:"name"`
	Parameters map[string]string `json:"parameters,omitempty"`
}

// Shape is a kind of machine.
type Shape struct {
	Name string `json:"name"`
	// GOARCH.
	Arch     string              `json:"arch"`
	Capacity corev1.ResourceList `json:"capacity"`
	// Allocatable is what its Node will offer: capacity without what the host keeps.
	Allocatable corev1.ResourceList `json:"allocatable"`
	Offerings   []Offering          `json:"offerings"`
}

// Offering is where, how and at what price a shape can be had.
type Offering struct {
	Zone string `json:"zone"`
	// CapacityType is on-demand, spot or reserved.
	CapacityType string `json:"capacityType"`
	// Price for an hour, in whatever the operator counts.
	Price     float64 `json:"price"`
	Available bool    `json:"available"`
}

// Order is for one instance.
type Order struct {
	Name         string            `json:"name"`
	Class        Class             `json:"class"`
	Shape        string            `json:"shape"`
	Zone         string            `json:"zone"`
	CapacityType string            `json:"capacityType"`
	Labels       map[string]string `json:"labels,omitempty"`
	// Taints with which the Node is made.
	Taints    []Taint   `json:"taints,omitempty"`
	Bootstrap Bootstrap `json:"bootstrap"`
}

type Taint struct {
	Key    string `json:"key"`
	Effect string `json:"effect"`
}

// Bootstrap is how the host joins its cell, once.
type Bootstrap struct {
	// Server is the cell's URL.
	Server string `json:"server"`
	// Authority is PEM.
	Authority string `json:"authority"`
	Token     string `json:"token"`
}

// Instance is a machine that is there, comes or goes.
type Instance struct {
	Name         string            `json:"name"`
	ProviderID   string            `json:"providerId"`
	Class        string            `json:"class"`
	Shape        string            `json:"shape"`
	Zone         string            `json:"zone"`
	CapacityType string            `json:"capacityType"`
	Labels       map[string]string `json:"labels,omitempty"`
	State        State             `json:"state"`
	CreatedAt    time.Time         `json:"createdAt"`
	// Message says why it failed.
	Message string `json:"message,omitempty"`
}

type State string

const (
	Starting State = "starting"
	Running  State = "running"
	Stopping State = "stopping"
	Failed   State = "failed"
)

// Bounds on what a driver may say.
const (
	mostShapes    = 1024
	mostOfferings = 64
	mostInstances = 16384
)

var label = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)

func (s *Shape) check() error {
	if !label.MatchString(s.Name) {
		return fmt.Errorf("shape %q: name must be a label's value", s.Name)
	}
	if s.Arch == "" {
		return fmt.Errorf("shape %s: arch is missing", s.Name)
	}
	for _, resource := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourcePods} {
		all, some := s.Capacity[resource], s.Allocatable[resource]
		if some.Sign() <= 0 {
			return fmt.Errorf("shape %s: allocatable.%s must be above 0", s.Name, resource)
		}
		if all.Cmp(some) < 0 {
			return fmt.Errorf("shape %s: capacity.%s is less than what is allocatable of it", s.Name, resource)
		}
	}
	if len(s.Offerings) == 0 || len(s.Offerings) > mostOfferings {
		return fmt.Errorf("shape %s: offerings must hold 1 to %d", s.Name, mostOfferings)
	}
	for i, offering := range s.Offerings {
		if !label.MatchString(offering.Zone) {
			return fmt.Errorf("shape %s: offerings[%d].zone must be a label's value", s.Name, i)
		}
		switch offering.CapacityType {
		case "on-demand", "spot", "reserved":
		default:
			return fmt.Errorf("shape %s: offerings[%d].capacityType must be on-demand, spot or reserved", s.Name, i)
		}
		if !(offering.Price >= 0) {
			return fmt.Errorf("shape %s: offerings[%d].price must be 0 or more", s.Name, i)
		}
	}
	return nil
}

func (i *Instance) check() error {
	if i.Name == "" || i.ProviderID == "" || i.Shape == "" || i.Zone == "" || i.CapacityType == "" {
		return fmt.Errorf("instance %q: name, providerId, shape, zone and capacityType must be said", i.Name)
	}
	switch i.State {
	case Starting, Running, Stopping, Failed:
		return nil
	default:
		return fmt.Errorf("instance %s: state %q is not known", i.Name, i.State)
	}
}
