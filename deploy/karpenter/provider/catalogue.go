package provider

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	karpenter "sigs.k8s.io/karpenter/pkg/apis/v1"
	"sigs.k8s.io/karpenter/pkg/cloudprovider"
	"sigs.k8s.io/karpenter/pkg/scheduling"

	"spindrift.dev/karpenter/api"
	"spindrift.dev/karpenter/driver"
)

const (
	// Karpenter asks for instance types many times in each of its rounds.
	fresh = 10 * time.Second
	// A catalogue of more classes forgets them all and asks again.
	mostClasses = 256
)

// catalogue is what the driver offers, remembered for a moment, without what it was
// out of a while ago.
type catalogue struct {
	driver driver.Driver
	memory time.Duration
	now    func() time.Time

	mutex sync.Mutex
	known map[string]page
	// Until when, by class, shape, zone and capacity type.
	out map[[4]string]time.Time
}

type page struct {
	shapes []driver.Shape
	at     time.Time
}

// choice is one thing that can be asked of the driver.
type choice struct {
	shape    *driver.Shape
	offering driver.Offering
}

func newCatalogue(of driver.Driver, memory time.Duration, now func() time.Time) *catalogue {
	return &catalogue{driver: of, memory: memory, now: now, known: map[string]page{}, out: map[[4]string]time.Time{}}
}

// shapes that the class allows. Offerings that are sold out are there, unavailable.
func (c *catalogue) shapes(ctx context.Context, class *api.HostClass) ([]driver.Shape, error) {
	key := hash(class)
	c.mutex.Lock()
	held, known := c.known[key]
	c.mutex.Unlock()
	if !known || c.now().Sub(held.at) >= fresh {
		told, err := c.driver.Shapes(ctx, classOf(class))
		if err != nil {
			return nil, err
		}
		held = page{shapes: told, at: c.now()}
		c.mutex.Lock()
		if len(c.known) >= mostClasses {
			clear(c.known)
		}
		c.known[key] = held
		c.mutex.Unlock()
	}
	return c.allowed(held.shapes, class), nil
}

// soldOut is remembered for a while.
func (c *catalogue) soldOut(class *api.HostClass, what choice) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	now := c.now()
	for key, until := range c.out {
		if !now.Before(until) {
			delete(c.out, key)
		}
	}
	c.out[outOf(class, what.shape.Name, what.offering)] = now.Add(c.memory)
}

func outOf(class *api.HostClass, shape string, offering driver.Offering) [4]string {
	return [4]string{class.Name, shape, offering.Zone, offering.CapacityType}
}

func (c *catalogue) allowed(told []driver.Shape, class *api.HostClass) []driver.Shape {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	now := c.now()
	left := []driver.Shape{}
	for _, shape := range told {
		if !allows(class.Spec.Shapes, shape.Name) {
			continue
		}
		offerings := []driver.Offering{}
		for _, offering := range shape.Offerings {
			if !allows(class.Spec.Zones, offering.Zone) {
				continue
			}
			if until, known := c.out[outOf(class, shape.Name, offering)]; known && now.Before(until) {
				offering.Available = false
			}
			offerings = append(offerings, offering)
		}
		if len(offerings) > 0 {
			shape.Offerings = offerings
			left = append(left, shape)
		}
	}
	return left
}

// allows: an empty list allows all.
func allows(list []string, one string) bool {
	return len(list) == 0 || slices.Contains(list, one)
}

func byPrice(choices []choice) {
	slices.SortStableFunc(choices, func(a, b choice) int {
		return cmp.Or(
			cmp.Compare(a.offering.Price, b.offering.Price),
			cmp.Compare(a.shape.Name, b.shape.Name),
			cmp.Compare(a.offering.Zone, b.offering.Zone),
		)
	})
}

func classOf(class *api.HostClass) driver.Class {
	return driver.Class{Name: class.Spec.Class, Parameters: class.Spec.Parameters}
}

// hash of what a host was made by. Shapes and zones only allow: a host that they
// still allow has not drifted.
func hash(class *api.HostClass) string {
	// Maps are encoded in the order of their keys.
	text, err := json.Marshal(classOf(class))
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}

// instanceType says of a shape what Karpenter's simulation reads.
func instanceType(shape driver.Shape, class *api.HostClass) *cloudprovider.InstanceType {
	zones, kinds := []string{}, []string{}
	offerings := cloudprovider.Offerings{}
	for _, offering := range shape.Offerings {
		zones = append(zones, offering.Zone)
		kinds = append(kinds, offering.CapacityType)
		offerings = append(offerings, &cloudprovider.Offering{
			Requirements: scheduling.NewLabelRequirements(map[string]string{
				corev1.LabelTopologyZone:       offering.Zone,
				karpenter.CapacityTypeLabelKey: offering.CapacityType,
			}),
			Price:     offering.Price,
			Available: offering.Available,
		})
	}
	kept := corev1.ResourceList{}
	for name, all := range shape.Capacity {
		left := all.DeepCopy()
		left.Sub(shape.Allocatable[name])
		kept[name] = left
	}
	one := func(key, value string) *scheduling.Requirement {
		return scheduling.NewRequirement(key, corev1.NodeSelectorOpIn, value)
	}
	return &cloudprovider.InstanceType{
		Name: shape.Name,
		Requirements: scheduling.NewRequirements(
			one(corev1.LabelInstanceTypeStable, shape.Name),
			one(corev1.LabelArchStable, shape.Arch),
			one(corev1.LabelOSStable, string(corev1.Linux)),
			one(api.ClassLabel, class.Spec.Class),
			scheduling.NewRequirement(corev1.LabelTopologyZone, corev1.NodeSelectorOpIn, zones...),
			scheduling.NewRequirement(karpenter.CapacityTypeLabelKey, corev1.NodeSelectorOpIn, kinds...),
		),
		Offerings: offerings,
		Capacity:  shape.Capacity,
		Overhead:  &cloudprovider.InstanceTypeOverhead{KubeReserved: kept, SystemReserved: none(), EvictionThreshold: none()},
	}
}

func none() corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: resource.Quantity{}}
}
